"""The composer: serves reads and writes of volumes out of their layers, and carries out what is asked of them."""
