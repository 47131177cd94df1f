"""The `_cancel` marker stops the starts it names, and no start that comes later."""

from storage import keys
from tasks.cancel import CancelWatch, cancel, exempt, is_cancelled
from tasks.stop import StopSignal
from tests.prefect_server import wait_for


def test_a_cancelled_start_stays_cancelled_and_others_go_on(memory_store):
    cancel(memory_store, "first")
    assert is_cancelled(memory_store, "first")
    exempt(memory_store, "second")
    assert not is_cancelled(memory_store, "second")
    cancel(memory_store, "second")
    assert is_cancelled(memory_store, "first")
    assert is_cancelled(memory_store, "second")


def test_a_new_start_goes_on_after_everyone_was_cancelled_and_stragglers_still_stop(memory_store):
    cancel(memory_store)
    exempt(memory_store, "new")
    assert is_cancelled(memory_store, "old")
    assert not is_cancelled(memory_store, "new")
    cancel(memory_store)
    assert is_cancelled(memory_store, "new")


def test_an_empty_marker_put_there_by_hand_cancels_everyone(memory_store):
    memory_store.put(keys.CANCEL, b"")
    assert is_cancelled(memory_store, "any")
    exempt(memory_store, "new")
    assert not is_cancelled(memory_store, "new")
    assert is_cancelled(memory_store, "any")


def test_a_watch_is_set_by_the_marker_and_by_the_signal_it_stands_for(memory_store):
    outer = StopSignal()
    watch = CancelWatch(memory_store, "mine", outer, poll_s=0.01)
    try:
        assert not watch.is_set()
        cancel(memory_store, "mine")
        wait_for(watch.is_set, "the watch is set", 60)
    finally:
        watch.close()
    other = CancelWatch(memory_store, "another", outer, poll_s=60)
    outer.set()
    assert other.is_set()
    other.close()
