"""What is learned: losses, metrics and optimizers as LightningModules."""
