"""What the plain-text tasks share: fitting to a length, prose, chronicles, source code."""
