"""Processes of a flow: environment, servers, worker, supervised children, terminal. Imports no other room."""
