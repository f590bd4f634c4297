"""`LiveConfig`: the configuration of an object that exists, as against one that was read."""

from typing import Any


class LiveConfig(dict[str, Any]):
    """What `get_config` of a layer that exists gives to `from_config` in the same process.

    Keras refuses to make layers that run code of others from a configuration whose source it does
    not know, and so `keras.models.clone_model` fails over them. Who holds this very object holds the
    layer, and has trusted it already: JSON, `keras.saving` and a copy into another dict make a
    plain dict of it, which is not trusted.

    Example:

    >>> isinstance(dict(LiveConfig(handle="…")), LiveConfig)
    False

    Reference:
        https://keras.io/api/models/model_saving_apis/serialization_utils/
    """
