"""Hyperparameter search for transfer learning, on KerasTuner.

`HyperTransfer` is the hypermodel, for any tuner. `funnel_search` searches heads on cached features
and fine-tunes the best; `FunnelOracle` says which trials that are. `durable` and `DurableTuner` make
any of KerasTuner's searches one that survives.

`space` declares the hyperparameters, `backbones` gives each trial its own, `trial_files` and
`records` are what a trial leaves, `search_result` gathers it.
"""

from keras_xfer.tuner.durable import DurableTuner, durable
from keras_xfer.tuner.funnel import FunnelOracle, funnel_search
from keras_xfer.tuner.hyper_transfer import HyperTransfer
from keras_xfer.tuner.search_result import SearchResult

__all__ = [
    "DurableTuner",
    "FunnelOracle",
    "HyperTransfer",
    "SearchResult",
    "durable",
    "funnel_search",
]
