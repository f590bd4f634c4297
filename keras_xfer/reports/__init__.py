"""Tables, plots and the report of a training run."""
