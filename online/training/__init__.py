"""The one trainer: pretrain, transfer and fine-tune a potential that is opened for training (``Tunable``). Needs torch; import it late."""
