"""Content-addressed artifacts and the Parquet store of parameters, in a folder or an object store. Imports networks
and below.
"""
