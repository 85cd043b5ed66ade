"""Sources: where records come from. One file a kind; `kinema.data.sources.base` says what they have in common."""
