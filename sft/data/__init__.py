"""Rows read from files, folders, URLs and the hub, and checks of their quality. Imports no other room."""
