"""Execution: the tensors of a step. Nothing else in the engine calls the model.

Nouns: `Executor`, which runs plans, and `LocalExecutor`, which does it here; `Cache` (pages and slots) with `transfer`
in and out of it; `StepInputs`, from rows to what the model reads; `DraftPasses`, `RecordedBatches`, `ExpertCounter`,
`ExpertReads`.
It imports `policy` for plans and `sampling`. A new kind of pass over the model, or of memory behind it, goes here.
"""
