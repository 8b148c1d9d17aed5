"""What people see and type: text of a model, the prompt of a conversation, bars, a training run."""
