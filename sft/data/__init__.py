"""Reading rows from files, folders, URLs and the Hub, and checking their quality. Imports no other room."""
