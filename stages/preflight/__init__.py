"""What `sft check` finds out before anything is computed: of the model, the machine and the services."""
