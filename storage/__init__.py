"""Storage: bytes that outlive us.

Owns every key a run writes, the leases that save work and the manifests that make it real.
Imports boto3 and pyarrow. Never imports torch, Prefect or another room.

    flows -> tasks -> inference | storage
                                  ^^^^^^^
"""
