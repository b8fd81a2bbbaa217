"""The comparison runner behind `nblora bench`: nblora and what users would pick instead, side by side.

One process a peer (`peers/`, which never imports this package), driven over pipes (`process`). A case is set up, its
results compared with a float64 reference (`cases`), and only then timed, in rounds (`runner`); the machine's limits are
measured in the same run (`limits`), start-up, memory and growth apart (`sections`), and all of it reported
(`report`, `chart`).
"""
