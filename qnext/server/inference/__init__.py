"""The model behind the server: its text side, the thread that owns the engine, and the answers while they are
generated.

`ServedModel` (served) turns text into token ids outside the event loop and compiles constraints. `EngineWorker`
(worker) is the only object that touches the engine. `Generation` (generation) represents a prompt's answers in the
event loop. May import `errors`, `limits`, `lanes`, engine and text. A child process is a file `*_worker.py`.
"""
