"""Who may call, how often, under which host name, and the audit log. No torch, nothing else of the server.

`Key` and `KeyRing` (keys), `KeyRates` and `FailedLogins` (rates), `AllowedHosts` (hosts), `AuditLog` (audit) and
its reading (audit_reading). A new limit of a key is a field of `Key`, checked in `keys` and enforced in `rates`. A new
filter of records is a field of `AuditFilter`.
"""
