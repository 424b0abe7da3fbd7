"""`/v2`: the Open Inference Protocol, whose models are the operations of each model."""
