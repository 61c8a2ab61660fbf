"""Requests by the thousand, made to break the services, against both as they are really served.

FUZZ_CASES (1,000) says how many and FUZZ_SEED (1) which. `schemas` makes them from the OpenAPI
documents, valid and invalid ones; `abuse` has what no document leads to, by hand and over a bare
socket; `health` asks for `/healthz` all the while, from a process of its own.
"""
