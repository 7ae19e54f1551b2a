"""Text tokenized to rows with labels: length limit, packing, preview. Imports `sft.chat` and `sft.data`."""
