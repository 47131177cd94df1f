import contextlib
import os
import threading
import time

import pytest

from tasks.frames import Deadline, Flight, Recorder, read_frame, write_frame


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    yield reading, writing
    for descriptor in (reading, writing):
        with contextlib.suppress(OSError):  # closed by the test
            os.close(descriptor)


def test_a_frame_larger_than_the_pipe_arrives_whole(pipe):
    reading, writing = pipe
    payload = os.urandom(3_000_000)
    writer = threading.Thread(target=write_frame, args=(writing, {"a": "é"}, payload))
    writer.start()
    frame = read_frame(reading, 30)
    writer.join()
    assert frame.header == {"a": "é"}
    assert bytes(frame.payload) == payload


def test_frames_without_payload_follow_each_other(pipe):
    reading, writing = pipe
    for number in range(3):
        write_frame(writing, {"n": number})
    assert [read_frame(reading, 5).header["n"] for _ in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("sent", [b"", b"\x05", b"\x05\0\0\0\0\0\0\0\0\0\0\0{}"])
def test_a_stream_that_ends_early_is_the_end(pipe, sent):
    reading, writing = pipe
    os.write(writing, sent)
    os.close(writing)
    assert read_frame(reading, 5) is None


def test_silence_beyond_the_deadline_is_told(pipe):
    started = time.monotonic()
    with pytest.raises(Deadline):
        read_frame(pipe[0], 0.2)
    assert time.monotonic() - started > 0.15


def test_half_a_frame_does_not_stretch_the_deadline(pipe):
    os.write(pipe[1], b"\x05")
    with pytest.raises(Deadline):
        read_frame(pipe[0], 0.2)


def test_writing_to_nobody_is_a_broken_pipe(pipe):
    os.close(pipe[0])
    with pytest.raises(BrokenPipeError):
        write_frame(pipe[1], {})


def test_what_one_side_records_the_other_reads():
    mine = Recorder()
    theirs = Recorder(os.dup(mine.descriptor))
    theirs.write(2, 10**12, 10**12 + 1)
    assert mine.read() == Flight(2, 10**12, 10**12 + 1)
    mine.close()
