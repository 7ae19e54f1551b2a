"""Servers on loopback: who may use them, and OpenAI's conventions for one of them. Imports no other room."""
