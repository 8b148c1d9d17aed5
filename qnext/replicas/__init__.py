"""Several copies of a server behind one address: which of them answers a request, and what happens when one dies.

Classes: PrefixIndex (who holds which beginnings), PrefixRouter (the same for Ray Serve), Replica (the server's routes
in a replica), Door (its port), DirectReplicas (calls there), Ingress (the address). May import server. Only router,
replica and ingress need Ray, which comes with the extra `ray`; nothing here needs torch. deploy/ray_serve.py says what
is started. A new rule of routing goes into `prefixes.py`; another way to start replicas beside `replica.py`.
"""
