"""The calls that applications make: a class for asyncio, one for everything else, the same names on both."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, ParamSpec

from . import _events
from ._attempts import stamp
from ._events import Event
from ._publisher import Message, RedisPublisher, default_publisher, prepare
from ._settings import RedisClient, To, given

P = ParamSpec("P")


class _Call(Generic[P]):
    """A method that works on the class (with the process's publisher) and on an instance (with its own)."""

    def __init__(self, build: Callable[P, Event]) -> None:
        self._build = build
        self.__doc__ = build.__doc__

    def _dressed(self, call: Callable[P, Any]) -> None:
        """Gives `call` the name, text and signature of its builder, so that help() and editors show them."""
        functools.update_wrapper(call, self._build)
        signature = inspect.signature(self._build).replace(return_annotation="bool")
        call.__signature__ = signature  # type: ignore[attr-defined]


class _SyncCall(_Call[P]):
    def __get__(self, instance: _Broadcaster | None, owner: type[object]) -> Callable[P, bool]:
        build, publisher = self._build, _publisher_of(instance)

        def call(*args: P.args, **kwargs: P.kwargs) -> bool:
            return publisher.publish(stamp(build(*args, **kwargs)))

        self._dressed(call)
        return call


class _AsyncCall(_Call[P]):
    def __get__(
        self, instance: _Broadcaster | None, owner: type[object]
    ) -> Callable[P, Coroutine[Any, Any, bool]]:
        build, publisher = self._build, _publisher_of(instance)

        async def call(*args: P.args, **kwargs: P.kwargs) -> bool:
            # Built and stamped before the hop: only this thread knows which Celery task it runs.
            return await _in_background(publisher, prepare(stamp(build(*args, **kwargs))))

        self._dressed(call)
        return call


class _Broadcaster:
    def __init__(
        self,
        redis_url: str | None = None,
        channel: str | None = None,
        *,
        client: RedisClient | None = None,
        to: To | None = None,
        ingest_length_max: int | None = None,
        raise_errors: bool | None = None,
        connect_timeout_s: float | None = None,
        socket_timeout_s: float | None = None,
    ) -> None:
        self._publisher = RedisPublisher(
            given(
                redis_url=redis_url,
                client=client,
                to=to,
                channel=channel,
                ingest_length_max=ingest_length_max,
                raise_errors=raise_errors,
                connect_timeout_s=connect_timeout_s,
                socket_timeout_s=socket_timeout_s,
            )
        )


class EventBroadcaster(_Broadcaster):
    """Publishes events from asyncio: `await EventBroadcaster.file_deleted("p1", "a.mp4")`.

    Every method works on the class and on an instance with settings of its own, those of `tidings.configure`,
    and returns True when Redis has taken the event. Redis being away does not raise unless `raise_errors` is
    set: it is logged and counted, the call returns False within about 3 s. A wrong argument raises ValueError
    or TypeError.

    Nothing is bound to an event loop: one thread of the process does the sending, in the order of the calls,
    also for loops that live for a single call. A cancelled caller does not take its event back.
    """

    project_created = _AsyncCall(_events.project_created)
    project_updated = _AsyncCall(_events.project_updated)
    project_deleted = _AsyncCall(_events.project_deleted)
    file_uploaded = _AsyncCall(_events.file_uploaded)
    file_deleted = _AsyncCall(_events.file_deleted)
    file_changed = _AsyncCall(_events.file_changed)
    workspace_changed = _AsyncCall(_events.workspace_changed)
    task_started = _AsyncCall(_events.task_started)
    task_progress = _AsyncCall(_events.task_progress)
    task_completed = _AsyncCall(_events.task_completed)
    task_failed = _AsyncCall(_events.task_failed)
    process_started = _AsyncCall(_events.process_started)
    process_progress = _AsyncCall(_events.process_progress)
    process_completed = _AsyncCall(_events.process_completed)
    publish = _AsyncCall(_events.publish)


class SyncEventBroadcaster(_Broadcaster):
    """The same calls for code without an event loop: each sends in the caller's thread and returns when done.

    In a coroutine use `EventBroadcaster`: while Redis is away these calls hold the loop up for about 3 s.
    """

    project_created = _SyncCall(_events.project_created)
    project_updated = _SyncCall(_events.project_updated)
    project_deleted = _SyncCall(_events.project_deleted)
    file_uploaded = _SyncCall(_events.file_uploaded)
    file_deleted = _SyncCall(_events.file_deleted)
    file_changed = _SyncCall(_events.file_changed)
    workspace_changed = _SyncCall(_events.workspace_changed)
    task_started = _SyncCall(_events.task_started)
    task_progress = _SyncCall(_events.task_progress)
    task_completed = _SyncCall(_events.task_completed)
    task_failed = _SyncCall(_events.task_failed)
    process_started = _SyncCall(_events.process_started)
    process_progress = _SyncCall(_events.process_progress)
    process_completed = _SyncCall(_events.process_completed)
    publish = _SyncCall(_events.publish)


def _publisher_of(instance: _Broadcaster | None) -> RedisPublisher:
    return default_publisher() if instance is None else instance._publisher


async def _in_background(publisher: RedisPublisher, message: Message) -> bool:
    sending = _submit(publisher, message)
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[bool] = loop.create_future()

    def wake(_: Future[bool]) -> None:
        # A closed loop means that nobody waits any more; the event is out all the same.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_settle, waiter, sending)

    # Not asyncio.wrap_future: a cancelled waiter would take an event that is still queued down with it.
    sending.add_done_callback(wake)
    return await waiter


def _settle(waiter: asyncio.Future[bool], sending: Future[bool]) -> None:
    if waiter.done():
        return
    error = sending.exception()
    if error is None:
        waiter.set_result(sending.result())
    else:
        waiter.set_exception(error)


async def drain(timeout_s: float) -> bool:
    """Waits until what was published from asyncio is out or given up; False if that took too long."""
    with _executor_lock:
        executor = _executor
    if executor is None:
        return True
    try:
        last = executor.submit(lambda: None)
    except RuntimeError:
        return True  # the interpreter is shutting down and has waited for it
    # One thread sends in order: when it comes to this, all that was before is done.
    done, _ = await asyncio.wait({asyncio.wrap_future(last)}, timeout=timeout_s)
    return bool(done)


_executor: ThreadPoolExecutor | None = None
_executor_lock = threading.Lock()


def _submit(publisher: RedisPublisher, message: Message) -> Future[bool]:
    global _executor
    try:
        with _executor_lock:
            if _executor is None:
                # One thread, not more: it is what keeps events in the order of the calls.
                _executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tidings")
            return _executor.submit(publisher.deliver, message)
    except RuntimeError:
        return _sent_here(publisher, message)  # the interpreter is shutting down and starts no threads


def _sent_here(publisher: RedisPublisher, message: Message) -> Future[bool]:
    done: Future[bool] = Future()
    try:
        done.set_result(publisher.deliver(message))
    except Exception as error:
        done.set_exception(error)
    return done


def _after_fork_in_child() -> None:
    # The thread stayed in the parent, and so did the sending of what was queued there.
    global _executor, _executor_lock
    _executor = None
    _executor_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
