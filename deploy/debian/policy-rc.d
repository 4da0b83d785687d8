#!/bin/sh
# No service is started in a sandbox because its package was installed.
exit 101
