"""archipfs: a volume store for virtual machines."""
