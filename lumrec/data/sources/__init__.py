"""Where logs come from: published data sets in their publishers' layouts, your own log, the simulator.

A source is a module with DEFAULT_SCHEMAS (name of a source → schema where the config declares none) and
`read(data, *, seed, scratch) -> RawLog`, where `data` is the DataConfig, and `scratch` an empty folder that is removed
after preparing.
"""
