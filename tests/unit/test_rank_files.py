"""What ranks are told of files on their way: every file once it is whole, never one before."""

import json
from pathlib import Path

import pytest

from inference.arriving import Arriving
from inference.errors import FilesLost, ModelError
from inference.rank_exit import ExitCode, code_of, error_of
from inference.rank_files import FileNews, hear, no_more


class Spoiled(Exception):
    """What a filler may die of."""


def told(news: FileNews, files: Arriving) -> int:
    """Pass on what is new, as it goes over a socket; return the number of messages."""
    messages = news.since_last()
    assert all(hear(files, json.loads(json.dumps(message))) for message in messages)
    return len(messages)


def test_a_rank_knows_what_the_replica_knows_and_is_told_it_once():
    here, there = Arriving(), Arriving()
    news, folder = FileNews(here), Path("/models/m")
    assert told(news, there) == 0
    assert not there.has_begun
    here.begin(folder)
    assert told(news, there) == 1
    assert there.known() == here.known() == (folder, frozenset(), False)
    here.add(folder / "b.safetensors")
    here.add(folder / "a.safetensors")
    assert told(news, there) == 1
    assert told(news, there) == 0
    assert there.known() == here.known()
    assert not news.is_over
    here.finish(folder)
    assert told(news, there) == 1
    assert there.known() == here.known() == (folder, there.known().names, True)
    assert news.is_over
    assert told(news, there) == 0


def test_ranks_that_start_again_are_told_everything():
    files, folder = Arriving(), Path("/models/m")
    files.begin(folder)
    files.add(folder / "a.safetensors")
    told(FileNews(files), Arriving())
    again = Arriving()
    assert told(FileNews(files), again) == 1
    assert again.known() == files.known()


def test_a_folder_that_nobody_fills_is_whole_at_once(tmp_path):
    there = Arriving()
    assert told(FileNews(Arriving.whole(tmp_path)), there) == 1
    assert there.wait_for_all() == tmp_path


def test_staging_that_failed_ends_a_rank_with_a_code_of_its_own():
    here, there = Arriving(), Arriving()
    here.fail(Spoiled("object replaced\nmore"))
    with pytest.raises(Spoiled) as spoiled:
        FileNews(here).since_last()
    assert hear(there, no_more(spoiled.value))
    with pytest.raises(FilesLost, match=r"on their way: Spoiled: object replaced$") as met:
        there.folder()
    assert code_of(met.value) == ExitCode.FILES_LOST
    assert error_of(ExitCode.FILES_LOST, "x").retryable


def test_a_model_that_moves_ends_the_rank_and_other_messages_are_left_alone():
    files = Arriving()
    for folder in ("/a", "/b"):
        hear(files, {"kind": "files", "folder": folder, "names": [], "is_whole": False})
    with pytest.raises(ModelError, match="moved"):
        files.folder()
    assert not hear(files, {"kind": "submit", "sequences": []})
