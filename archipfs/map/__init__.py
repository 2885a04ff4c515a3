"""The mapper: who is called what, which layers a volume is made of, who may write it.

It owns the records in the store and the order in which they change; it never touches a volume's bytes.
"""
