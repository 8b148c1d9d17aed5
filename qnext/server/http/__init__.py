"""The wire: from the bytes of a connection to the handler of a route, and back.

`PatientProtocol` (protocol) is uvicorn's HTTP/1.1 with bounds. `Guard` (guard) checks every request. `Endpoint`
(endpoint) does the same steps for every route. `make_application` (application) connects them. May import `server`,
`exchange` and what stands below; no surface. A new check of every request goes into `guard`.
"""
