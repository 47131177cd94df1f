"""Models as they are found in the wild: a shard missing, weights tied and spread over files."""

from pathlib import Path

import pytest

from inference.weights import check_model_folder
from storage.errors import BadInput
from tasks.stage import stage
from tests.model_files import folder_bytes

MODELS = Path(__file__).parents[1] / "data" / "models"


def test_a_missing_weight_file_is_named_before_anything_moves(tmp_path: Path) -> None:
    for stage_to in ("none", str(tmp_path / "cache")):
        with pytest.raises(BadInput, match=r"names model-00002-of-00003\.safetensors"):
            stage(str(MODELS / "tiny-a-missing-shard"), stage_to=stage_to)
    assert not list((tmp_path / "cache").rglob("model-0*"))


def test_tied_weights_over_several_files_arrive_whole(tmp_path: Path) -> None:
    model = MODELS / "tiny-tied-sharded"
    with stage(str(model), stage_to=str(tmp_path / "cache")) as staged:
        assert folder_bytes(staged.path) == folder_bytes(model)
        assert check_model_folder(staged.path).content_id == check_model_folder(model).content_id
