"""Who may use a server on loopback: no other web page, and only with its key. Imports no other room."""
