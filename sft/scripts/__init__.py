"""What training scripts import beside the trainer, under trl's names: arguments, parser, data sets, callbacks."""
