"""Opening code and files that come from elsewhere, in a child process with limits of time and memory.

Imports no other room, and no torch.
"""
