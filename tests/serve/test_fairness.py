"""The queue by itself, then a greedy client beside a modest one on a real server."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from winnow.serve.fairness import FairQueue

NUMBERS = count()


@dataclass(eq=False)
class Request:
    client: str
    cost: int = 100
    priority: int = 0
    arrival: int = field(default_factory=lambda: next(NUMBERS))


def drain(queue: FairQueue) -> list[Request]:
    taken = []
    while len(queue):
        first = next(queue.order())
        queue.take(first)
        taken.append(first)
    return taken


def test_clients_take_turns_whoever_came_first():
    queue: FairQueue[Request] = FairQueue(quantum=100)
    for client in "aaaaaab":
        queue.push(Request(client))
    assert [r.client for r in drain(queue)].index("b") <= 1


def test_long_requests_of_one_cost_it_turns():
    queue: FairQueue[Request] = FairQueue(quantum=100)
    for _ in range(4):
        queue.push(Request("long", cost=1000))
    for _ in range(20):
        queue.push(Request("short", cost=100))
    order = [r.client for r in drain(queue)]
    # Ten short requests go by for every long one.
    first, second = (i for i, name in enumerate(order) if name == "long" and order[:i].count("long") < 2)
    assert 8 <= order[:first].count("short") <= 11
    assert order[:second].count("short") >= 18


def test_priorities_order_the_requests_of_one_client_only():
    queue: FairQueue[Request] = FairQueue(quantum=100)
    calm, pushy, late = Request("a"), Request("b", priority=-9), Request("a", priority=-1)
    for one in (calm, pushy, late):
        queue.push(one)
    order = drain(queue)
    assert order.index(late) < order.index(calm)
    assert order.index(late) < order.index(pushy)  # "a" came first; "b" cannot buy its turn


@given(
    requests=st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(1, 3000), st.integers(-2, 2)), min_size=1, max_size=60
    ),
    quantum=st.integers(1, 1000),
)
@settings(max_examples=100, deadline=None)
def test_nobody_gets_more_than_a_turn_ahead(requests, quantum):
    queue: FairQueue[Request] = FairQueue(quantum=quantum)
    for client, cost, priority in requests:
        queue.push(Request(client, cost, priority))
    total, most = dict.fromkeys("abcd", 0), max(cost for _, cost, _ in requests)
    while len(queue):
        waiting = {r.client for r in queue}
        first = next(queue.order())
        queue.take(first)
        total[first.client] += first.cost
        # As long as two clients wait, what they got differs by less than two requests and two turns.
        if waiting == set("abcd"):
            assert max(total.values()) - min(total.values()) <= 2 * (most + quantum)
    assert sum(total.values()) == sum(cost for _, cost, _ in requests)


def test_the_crowd_is_turned_away_for_the_modest():
    queue: FairQueue[Request] = FairQueue()
    crowd = [Request("greedy") for _ in range(5)]
    for one in crowd:
        queue.push(one)
    assert queue.crowd("modest") is crowd[-1]
    assert queue.crowd("greedy") is None
    assert queue.remove(crowd[-1])
    assert not queue.remove(crowd[-1])


def test_a_greedy_client_starves_nobody(start):
    server = start(max_num_seqs=4, api_keys=("greedy", "modest"), max_queue=50)
    greedy, modest = server.client(api_key="greedy"), server.client(api_key="modest")
    body = {"ignore_eos": True}

    def ask(client, tokens: int) -> None:
        client.completions.create(model="tiny", prompt=[5] * 30, max_tokens=tokens, extra_body=body)

    crowd = [threading.Thread(target=ask, args=(greedy, 150)) for _ in range(24)]
    for one in crowd:
        one.start()
    while len(server.worker.waiting()) < 15:
        time.sleep(0.01)
    waited = []
    for _ in range(3):
        begin = time.monotonic()
        ask(modest, 10)
        waited.append(time.monotonic() - begin)
    left = len(server.worker.waiting()) + len(server.worker.running())
    for one in crowd:
        one.join()
    # Three requests, one after the other, ended while a third of the crowd was still there; first come,
    # first served would have let nearly all of it go before.
    assert left >= 8, (left, waited)
    assert max(waited) < 10


def test_a_greedy_client_starves_nobody_of_memory(start, tmp_path):
    """There are slots for everybody and memory for four; what the crowd's answers grow into is preempted."""
    server = start(
        max_num_seqs=64, kv_memory=1 << 20, swap_space=256 << 10, swap_dir=tmp_path, prefix_caching=False
    )
    client = server.client()

    def ask(user: str, tokens: int) -> int:
        answer = client.completions.create(
            model="tiny", prompt=[5] * 30, max_tokens=tokens, user=user, extra_body={"ignore_eos": True}
        )
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(20) as pool:
        crowd = [pool.submit(ask, "greedy", 500) for _ in range(20)]
        while not server.worker.counters.preemptions:
            time.sleep(0.01)
        assert [ask("modest", 200) for _ in range(2)] == [200, 200]
        left = sum(not one.done() for one in crowd)
        assert [one.result() for one in crowd] == [500] * 20
    assert left >= 10, left
    assert server.worker.memory.peak <= 1 << 20
    server.idle()
    assert not server.worker.memory.elsewhere()
