"""Processes of a flow: environment, servers, supervised children, terminal. Imports no other room."""
