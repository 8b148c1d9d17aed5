"""Programs that speak HTTP to a server: a conversation, a batch of requests, a measured load.

Nouns: `RemoteConversation`, `BatchRequest`, `Workload`, `Timing`. May import text and session; no torch. A new way to
use a server is a file here. What is printed belongs to the command line.
"""
