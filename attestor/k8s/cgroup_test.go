package k8s

import (
	"strings"
	"testing"
)

const (
	uidA   = "2c48913c-b29f-11e7-9350-020968147796"
	uidB   = "72f7f152-440c-66ac-9084-e0fc1d8a910c"
	hashed = "2732ca68f6358eba7703fb6f82a25c94" // UID of a static pod
)

var (
	idA  = strings.Repeat("a1", 32)
	idB  = strings.Repeat("b2", 32)
	idC  = strings.Repeat("c3", 32)
	node = strings.Repeat("0d", 32) // a container that is a node
)

func slice(uid string) string { return strings.ReplaceAll(uid, "-", "_") }

// Paths of the agent's own cgroup.
var (
	ownService  = "0::/system.slice/narthex.service\n"
	ownPod      = "0::/kubepods/burstable/pod" + uidB + "/" + idC + "\n"
	ownPodSlice = "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + slice(uidB) + ".slice/cri-containerd-" + idC + ".scope\n"
	ownAlone    = "0::/\n"
)

func TestPlaceOf(t *testing.T) {
	inA := place{uidA, idA}
	for name, test := range map[string]struct {
		own    string
		cgroup string
		want   place
		err    string
	}{
		// cgroup drivers and runtimes, the agent on the host or in its root cgroup
		"cgroupfs":              {ownService, "0::/kubepods/burstable/pod" + uidA + "/" + idA, inA, ""},
		"cgroupfs, best effort": {ownAlone, "0::/kubepods/besteffort/pod" + uidA + "/" + idA, inA, ""},
		"cgroupfs, guaranteed":  {ownAlone, "0::/kubepods/pod" + uidA + "/" + idA, inA, ""},
		"static pod":            {ownAlone, "0::/kubepods/burstable/pod" + hashed + "/" + idA, place{hashed, idA}, ""},
		"systemd, containerd":   {ownService, "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + slice(uidA) + ".slice/cri-containerd-" + idA + ".scope", inA, ""},
		"systemd, guaranteed":   {ownService, "0::/kubepods.slice/kubepods-pod" + slice(uidA) + ".slice/cri-containerd-" + idA + ".scope", inA, ""},
		"systemd, docker":       {ownService, "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + slice(uidA) + ".slice/docker-" + idA + ".scope", inA, ""},
		"systemd, cri-o":        {ownService, "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + slice(uidA) + ".slice/crio-" + idA + ".scope", inA, ""},
		"cri-o with crun":       {ownService, "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + slice(uidA) + ".slice/crio-" + idA + ".scope/container", inA, ""},
		"cgroupfs, cri-o":       {ownService, "0::/kubepods/besteffort/pod" + uidA + "/crio-" + idA, inA, ""},
		"dashes in a slice":     {ownService, "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidA + ".slice/docker-" + idA + ".scope", inA, ""},
		"joined name":           {ownService, "0::/kubepods-besteffort-pod" + slice(uidA) + ".slice:cri-containerd:" + idA, inA, ""},
		"joined name below":     {ownService, "0::/system.slice/containerd.service/kubepods-besteffort-pod" + slice(uidA) + ".slice:cri-containerd:" + idA, inA, ""},
		"cgroup v1": {ownAlone, "12:memory:/kubepods/burstable/pod" + uidA + "/" + idA + "\n" +
			"4:cpu,cpuacct:/kubepods/burstable/pod" + uidA + "/" + idA + "\n1:name=systemd:/kubepods/burstable/pod" + uidA + "/" + idA + "\n0::/\n", inA, ""},
		"cgroup v1 and a unified hierarchy elsewhere": {ownAlone, "1:cpuset:/kubepods/burstable/pod" + uidA + "/" + idA + "\n0::/system.slice/containerd.service\n", inA, ""},

		// nodes that are containers
		"kind, cgroup v1": {
			"1:cpuset:/docker/" + node + "/kubelet/kubepods/besteffort/pod" + uidB + "/" + idC + "\n",
			"1:cpuset:/docker/" + node + "/kubelet/kubepods/besteffort/pod" + uidA + "/" + idA + "\n0::/docker/" + node + "/system.slice/containerd.service\n", inA, "",
		},
		"kind, cgroup v1, agent on the node": {
			"1:cpuset:/docker/" + node + "/system.slice/narthex.service\n", "1:cpuset:/docker/" + node + "/kubelet/kubepods/besteffort/pod" + uidA + "/" + idA, inA, "",
		},
		"kind, cgroup v2": {
			ownService,
			"0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + slice(uidA) + ".slice/cri-containerd-" + idA + ".scope", inA, "",
		},
		"kind, cgroup v2, agent in a pod": {
			"0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + slice(uidB) + ".slice/cri-containerd-" + idC + ".scope\n",
			"0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + slice(uidA) + ".slice/cri-containerd-" + idA + ".scope", inA, "",
		},
		"minikube": {
			"5:pids:/docker/" + node + "/kubepods/burstable/pod" + uidB + "/" + idC + "\n",
			"5:pids:/docker/" + node + "/kubepods/burstable/pod" + uidA + "/" + idA, inA, "",
		},
		"another node on the same machine": {
			"5:pids:/docker/" + node + "/kubepods/burstable/pod" + uidB + "/" + idC + "\n",
			"5:pids:/docker/" + idB + "/kubepods/burstable/pod" + uidA + "/" + idA,
			place{},
			"",
		},
		"a node that is a pod": {
			"0::/kubepods/burstable/pod" + uidB + "/" + idB + "/kubelet/kubepods/pod" + uidB + "/" + idC + "\n",
			"0::/kubepods/burstable/pod" + uidB + "/" + idB + "/kubelet/kubepods/pod" + uidA + "/" + idA, inA, "",
		},
		"cgroup root of the kubelet": {
			"0::/custom/root/kubepods/burstable/pod" + uidB + "/" + idC + "\n", "0::/custom/root/kubepods/burstable/pod" + uidA + "/" + idA, inA, "",
		},
		"kubeedge with cri-o":                     {ownAlone, "0::/../crio-" + idA + ".scope", place{"", idA}, ""},
		"kubeedge with cri-o, agent on the host":  {ownService, "0::/system.slice/crio-" + idA + ".scope", place{"", idA}, ""},
		"kubeedge with cri-o, another namespace":  {ownAlone, "0::/system.slice/crio-" + idA + ".scope", place{"", idA}, ""},
		"docker beside the kubelet, in no pod":    {ownService, "0::/system.slice/docker-" + idA + ".scope", place{}, ""},
		"docker beside the kubelet, cgroupfs":     {ownService, "0::/docker/" + idA, place{}, ""},
		"podman beside the kubelet":               {ownService, "0::/machine.slice/libpod-" + idA + ".scope/container", place{}, ""},
		"the agent in docker, another one beside": {"0::/docker/" + idC + "\n", "0::/docker/" + idA, place{}, ""},

		// the agent in a cgroup namespace of its own
		"same class":                 {ownAlone, "0::/../../pod" + uidA + "/" + idA, inA, ""},
		"another class":              {ownAlone, "0::/../../../burstable/pod" + uidA + "/" + idA, inA, ""},
		"guaranteed":                 {ownAlone, "0::/../../../pod" + uidA + "/" + idA, inA, ""},
		"systemd, same class":        {ownAlone, "0::/../../kubepods-burstable-pod" + slice(uidA) + ".slice/cri-containerd-" + idA + ".scope", inA, ""},
		"systemd, another class":     {ownAlone, "0::/../../../kubepods-besteffort.slice/kubepods-besteffort-pod" + slice(uidA) + ".slice/crio-" + idA + ".scope", inA, ""},
		"kind, another class":        {ownAlone, "0::/../../kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + slice(uidA) + ".slice/cri-containerd-" + idA + ".scope", inA, ""},
		"from above the pods":        {ownAlone, "0::/../../../../kubepods.slice/kubepods-pod" + slice(uidA) + ".slice/docker-" + idA + ".scope", inA, ""},
		"joined name in a namespace": {ownAlone, "0::/../kubepods-besteffort-pod" + slice(uidA) + ".slice:cri-containerd:" + idA, inA, ""},
		"sibling":                    {ownAlone, "0::/../" + idA, place{"", idA}, ""},
		"sibling, systemd":           {ownAlone, "0::/../cri-containerd-" + idA + ".scope", place{"", idA}, ""},
		"sibling, crun":              {ownAlone, "0::/../../crio-" + idA + ".scope/container", place{"", idA}, ""},
		"the agent's own container":  {ownAlone, "0::/", place{}, ""},
		"a service of the host":      {ownAlone, "0::/../../../../system.slice/cron.service", place{}, ""},

		// what a container or a user made
		"nested runtime":              {ownService, "0::/kubepods/burstable/pod" + uidA + "/" + idA + "/docker/" + idB, inA, ""},
		"nested kubelet":              {ownService, "0::/kubepods/burstable/pod" + uidA + "/" + idA + "/kubelet/kubepods/pod" + uidB + "/" + idB, inA, ""},
		"names another container":     {ownPod, "0::/kubepods/burstable/pod" + uidA + "/" + idA + "/" + idB, inA, ""},
		"names another pod":           {ownPodSlice, "0::/kubepods.slice/kubepods-pod" + slice(uidA) + ".slice/docker-" + idA + ".scope/kubepods.slice/kubepods-pod" + slice(uidB) + ".slice/docker-" + idB + ".scope", inA, ""},
		"names another, in namespace": {ownAlone, "0::/../../pod" + uidA + "/" + idA + "/../../pod" + uidB + "/" + idB, inA, ""},
		"names another, joined":       {ownAlone, "0::/../../pod" + uidA + "/" + idA + "/kubepods-pod" + slice(uidB) + ".slice:cri-containerd:" + idB, inA, ""},
		"a user's cgroup":             {ownPod, "0::/user.slice/user-1000.slice/user@1000.service/kubepods/burstable/pod" + uidA + "/" + idA, place{}, ""},
		"a user's slices":             {ownService, "0::/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod" + slice(uidA) + ".slice/crio-" + idA + ".scope", place{}, ""},
		"a user's, above":             {ownAlone, "0::/../../../../user.slice/user-1000.slice/user@1000.service/pod" + uidA + "/" + idA, place{}, ""},
		"a user's kubelet":            {ownService, "0::/user.slice/user-1000.slice/kubelet/kubepods/pod" + uidA + "/" + idA, place{}, ""},
		"a user's scope":              {ownService, "0::/user.slice/crio-" + idA + ".scope", place{}, ""},
		"a user's, beside the agent": {
			"0::/user.slice/user-1000.slice/user@1000.service/app.slice/narthex.service\n",
			"0::/user.slice/user-1000.slice/user@1000.service/kubepods/burstable/pod" + uidA + "/" + idA,
			place{},
			"",
		},
		"in the agent's container": {ownAlone, "0::/pod" + uidA + "/" + idA, place{}, ""},
		"docker as a parent":       {ownService, "0::/docker/" + idB + "/kubepods/pod" + uidA + "/" + idA, place{}, ""},
		"beside the pods":          {ownPod, "0::/kubepods2/burstable/pod" + uidA + "/" + idA, place{}, ""},
		"beside the pods' root": {
			"0::/custom/kubepods/burstable/pod" + uidB + "/" + idC + "\n", "0::/customs/kubepods/burstable/pod" + uidA + "/" + idA, place{}, "",
		},

		// none, or not one
		"conmon":                 {ownService, "0::/kubepods.slice/kubepods-pod" + slice(uidA) + ".slice/crio-conmon-" + idA + ".scope", place{}, ""},
		"conmon beside":          {ownAlone, "0::/../crio-conmon-" + idA + ".scope", place{}, ""},
		"pod without container":  {ownService, "0::/kubepods/burstable/pod" + uidA, place{}, ""},
		"a process of the host":  {ownService, "0::/system.slice/sshd.service", place{}, ""},
		"kernel thread":          {ownAlone, "0::/", place{}, ""},
		"no line":                {ownService, "", place{}, ""},
		"upper case":             {ownService, "0::/kubepods/pod" + uidA + "/" + strings.ToUpper(idA), place{}, ""},
		"too short":              {ownService, "0::/kubepods/pod" + uidA + "/" + idA[1:], place{}, ""},
		"too long":               {ownService, "0::/kubepods/pod" + uidA + "/a" + idA, place{}, ""},
		"runtime with an odd ID": {ownService, "0::/kubepods/pod" + uidA + "/x_" + idA, place{}, ""},
		"deleted":                {ownService, "0::/kubepods/pod" + uidA + "/" + idA + " (deleted)", place{}, ""},
		"odd UID":                {ownService, "0::/kubepods/pod" + uidA + "%/" + idA, place{}, ""},
		"long UID":               {ownService, "0::/kubepods/pod" + strings.Repeat("a", 65) + "/" + idA, place{}, ""},
		"no UID":                 {ownService, "0::/kubepods/pod/" + idA, place{}, ""},

		"two pods":       {ownAlone, "2:cpu:/kubepods/pod" + uidA + "/" + idA + "\n1:pids:/kubepods/pod" + uidB + "/" + idA, place{}, "name two pods"},
		"two containers": {ownAlone, "2:cpu:/kubepods/pod" + uidA + "/" + idA + "\n1:pids:/kubepods/pod" + uidA + "/" + idB, place{}, "name two containers"},
		"pod in one only": {
			ownAlone, "2:cpu:/../" + idA + "\n1:pids:/kubepods/pod" + uidA + "/" + idA, inA, "",
		},
		"no fields":   {ownAlone, "kubepods", place{}, "without fields"},
		"one field":   {ownAlone, "0:/kubepods", place{}, "with one field"},
		"no slash":    {ownAlone, "0::kubepods", place{}, "begin with a slash"},
		"empty line":  {ownAlone, "\n", place{}, "without fields"},
		"colons only": {ownAlone, ":::", place{}, "begin with a slash"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := placeOf(test.cgroup, test.own)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) || got != (place{}) {
					t.Fatalf("got %v, %v; want error %q", got, err, test.err)
				}
				return
			}
			if err != nil || got != test.want {
				t.Fatalf("got %v, %v; want %v", got, err, test.want)
			}
		})
	}
}

// FuzzPlaceOf holds to what a path may at most mean: what is appended to a
// container's path, or stands below a user's cgroup, changes nothing.
func FuzzPlaceOf(f *testing.F) {
	f.Add("/kubepods/burstable/pod"+uidA+"/"+idA, ownAlone)
	f.Add("/../../kubepods-besteffort-pod"+slice(uidA)+".slice:cri-containerd:"+idA, ownPod)
	f.Add("/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod"+slice(uidA)+".slice/crio-"+idA+".scope", ownService)
	f.Add("/../crio-"+idA+".scope", "")
	f.Fuzz(func(t *testing.T, path, own string) {
		if strings.ContainsRune(path, '\n') {
			return
		}
		got, err := placeOf("0::/"+path, own)
		if err != nil {
			return
		}
		if got.container == "" && got != (place{}) || got.container != "" && !isContainerID(got.container) || len(got.pod) > maxUID {
			t.Fatalf("place %q of %q", got, path)
		}
		if got.container != "" && !strings.Contains(path, got.container) {
			t.Fatalf("container %s is not in %q", got.container, path)
		}
		const mine = "/kubepods/pod" + uidA + "/"
		for name, forged := range map[string]string{"container": mine + idA + "/" + path, "sibling": "/../../pod" + uidA + "/" + idA + "/" + path} {
			if got, err := placeOf("0::"+forged, ownAlone); err != nil || got != (place{uidA, idA}) {
				t.Fatalf("%s: place %v, %v of %q", name, got, err, forged)
			}
		}
		if got, err := placeOf("0::/user.slice/user-1000.slice/"+path, ownService); err != nil || got != (place{}) {
			t.Fatalf("place %v, %v of a user's cgroup %q", got, err, path)
		}
	})
}
