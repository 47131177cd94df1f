"""Tasks: units of retry, where inference meets storage.

Owns planning, staging, generating, publishing and verifying, each as a plain function.
May import inference and storage. Heavy libraries are imported inside the functions that need them.

    flows -> tasks -> inference | storage
             ^^^^^
"""
