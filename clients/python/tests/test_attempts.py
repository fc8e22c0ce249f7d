from __future__ import annotations

from tidings import _attempts


def test_an_attempt_ends_once_and_the_first_word_counts():
    ends = _attempts.Ends()
    assert ends.claim("p", "t", 0, "task.failed")
    assert not ends.claim("p", "t", 0, "task.failed"), "Celery reports a hard time limit twice"
    assert not ends.claim("p", "t", 0, "task.completed")
    assert ends.claim("p", "t", 1, "task.completed")
    assert ends.claim("other", "t", 0, "task.failed")
    ends.reopen("t", 0)
    assert ends.claim("p", "t", 0, "task.completed")


def test_what_was_sent_by_hand_is_repeated_but_not_contradicted():
    ends = _attempts.Ends()
    assert ends.claim("p", "t", 0, "task.failed", by_hand=True)
    assert not ends.claim("p", "t", 0, "task.completed")
    assert ends.claim("p", "t", 0, "task.failed")
    assert not ends.claim("p", "t", 0, "task.failed")


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(_attempts, "_REMEMBERED_MAX", 3)
    attempts = _attempts.Attempts()
    for number in range(5):
        attempts.begin(f"t{number}", 1)
    assert [attempts.number(f"t{number}") for number in range(5)] == [0, 0, 1, 1, 1]
