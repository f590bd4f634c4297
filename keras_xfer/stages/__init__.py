"""A fine-tuning schedule: what each stage trains, at which rate, for how long.

- `stage`: `Stage`, as users write it.
- `planning`: stages placed in the epochs of a fit and in the layers of a model.
- `dry_run`: the table of what a schedule would do.
- `current`: the stage of a running fit.
- `yaml_files`: stages as a file that people edit.
"""

from keras_xfer.stages.planning import gradual
from keras_xfer.stages.stage import Stage
from keras_xfer.stages.yaml_files import stages_from_yaml, stages_to_yaml

__all__ = ["Stage", "gradual", "stages_from_yaml", "stages_to_yaml"]
