"""Handles of SavedModels: folders, archives and addresses become a folder on this machine.

- `resolve`: the one function that others use.
- `local`: folders and archives that lie on this machine.
- `addresses`: where an archive is asked for, and what tfhub.dev became.
- `downloads`: archives fetched over HTTP.
- `elsewhere`: what kagglehub and tensorflow_hub fetch.
- `module_cache`: the cache that downloads are kept in, one copy for all processes.
- `archives`: unpacking that writes nothing outside its folder.
- `saved_models`: where in a folder the SavedModel is.
- `failures`: what these files tell each other when something cannot be had.
"""

from keras_xfer.handles.resolving import resolve

__all__ = ["resolve"]
