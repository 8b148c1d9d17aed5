"""The page of a training run: a small server on this machine alone, and the files of the page. No torch.

`serving` (serving) opens it. It reads metrics.jsonl as it grows and knows nothing else of the run. So a run of this
process, one of another, and one that has ended are the same to it. May import what diagnostics may, and no torch. A new
figure: `page/run.js`.
"""
