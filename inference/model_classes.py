"""Which models transformers has a class for; imports transformers, so it is asked for by those who doubt it."""

from transformers import __version__ as version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from inference.errors import ModelError
from inference.weights import SmallFiles


def refuse_unknown_class(folder: SmallFiles) -> None:
    """Refuse a model that nothing but code of its own could load. Raises ModelError."""
    model_type = folder.config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{folder.path}: config.json has model_type {str(model_type)[:100]!r}, for which transformers {version} ships "
            "no class, and code of the model's own is never run; use a model that it knows"
        )
