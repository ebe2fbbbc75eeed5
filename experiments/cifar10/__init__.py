"""CIFAR-10 experiments: data, models, training engine, checkpoints and report behind the two scripts next door."""
