// Scratch memory that a thread keeps from call to call: a new mapping would cost a page fault for every 4 KiB of it.
#pragma once
#include "memory.h"

namespace winnow {
namespace WINNOW_ISA {

class Scratch {
 public:
  // At least so many bytes; what they held is lost.
  char* take(int64_t bytes) {
    if (bytes_ < bytes) {
      free();  // before the larger one is made
      memory_ = allocate(bytes);
      bytes_ = bytes;
    }
    return memory_.get();
  }
  void free() { *this = {}; }
  void free_above(int64_t bytes) {
    if (bytes_ > bytes) free();
  }

 private:
  Memory memory_;
  int64_t bytes_ = 0;
};

}  // namespace WINNOW_ISA
}  // namespace winnow
