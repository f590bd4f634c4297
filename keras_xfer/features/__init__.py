"""Never compute a frozen layer twice: `split_model`, `FeatureCache` and `fit_staged`."""
