#!/bin/bash
# A throwaway Ceph with an S3 gateway on loopback, for `python -m tests.conformance`; all in memory.
#   apt-get install --no-install-recommends radosgw ceph-mon ceph-osd
#   bash tests/ceph_gateway.sh FOLDER PORT      then: keys ciaccess / cisecretcisecret
#   kill $(cat FOLDER/*.pid)                    to stop it
set -eu
folder=$1 port=$2 monitor=$((port + 1))
mkdir -p "$folder"
cd "$folder"
id=$(cat /proc/sys/kernel/random/uuid)
cat > ceph.conf <<CONF
[global]
fsid = $id
mon host = [v2:127.0.0.1:$monitor,v1:127.0.0.1:$((monitor + 1))]
public addr = 127.0.0.1
ms bind ipv4 = true
ms mon client mode = crc
ms cluster mode = crc
ms service mode = crc
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon warn on pool no redundancy = false
osd pool default pg num = 8
osd pool default pgp num = 8
osd pool default pg autoscale mode = off
mon max pg per osd = 1000
osd crush chooseleaf type = 0
osd objectstore = memstore
osd class dir = /usr/lib/x86_64-linux-gnu/rados-classes
memstore device bytes = 4294967296
osd memory target = 2147483648
run dir = $PWD
log file = $PWD/\$name.log
pid file = $PWD/\$name.pid
admin socket = $PWD/\$name.asok
mon data = $PWD/mon.a
mgr data = $PWD/mgr.x
osd data = $PWD/osd.0
rgw data = $PWD/rgw
keyring = $PWD/keyring
rgw frontends = beast endpoint=127.0.0.1:$port
rgw dns name =
CONF
: > keyring
export CEPH_CONF=$PWD/ceph.conf
mkdir -p mon.a mgr.x osd.0 rgw
monmaptool --create --clobber --addv a "[v2:127.0.0.1:$monitor,v1:127.0.0.1:$((monitor + 1))]" --fsid "$id" monmap > /dev/null
ceph-mon -c ceph.conf --mkfs -i a --monmap monmap
ceph-mon -c ceph.conf -i a
osd=$(cat /proc/sys/kernel/random/uuid)
ceph -c ceph.conf osd new "$osd" > /dev/null
ceph-osd -c ceph.conf -i 0 --mkfs --osd-uuid "$osd" 2> /dev/null
ceph-osd -c ceph.conf -i 0
for _ in $(seq 60); do ceph -c ceph.conf osd stat 2> /dev/null | grep -q "1 up" && break; sleep 0.3; done
radosgw -c ceph.conf -n client.rgw.a
for _ in $(seq 200); do (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null && break; sleep 0.3; done
radosgw-admin -c ceph.conf user create --uid=ci --display-name=ci --access-key=ciaccess --secret-key=cisecretcisecret > /dev/null
echo "http://127.0.0.1:$port"
