package k8s

import (
	"errors"
	"fmt"
	"strings"
)

// maxCgroup bounds /proc/PID/cgroup: some dozen hierarchies of cgroup v1,
// with paths of which the kernel shows none longer than 4 KiB.
const maxCgroup = 64 << 10

const (
	containerIDLen = 64 // hexadecimal digits, in every container runtime's
	maxUID         = 64 // bytes; a UUID has 36, the hash of a static pod 32
)

// place is where in the cluster a process runs, by its cgroups. The zero
// place is outside of every container of a pod.
type place struct {
	pod       string // UID; empty where the cgroup does not tell, as in the agent's own pod
	container string // ID, without the runtime before it
}

// placeOf returns the place of the process whose /proc/PID/cgroup this is.
// own is that of the agent itself, read from the same proc file system, and
// says where the node's cgroups begin.
//
// On cgroup v1 a process is in one cgroup of each hierarchy. Those that name
// a pod or a container must agree: two places are an error, never a choice.
func placeOf(cgroup, own string) (place, error) {
	var found place
	for line := range strings.Lines(cgroup) {
		hierarchy, path, err := cutLine(line)
		if err != nil {
			return place{}, err
		}
		here := locate(path, pathIn(own, hierarchy))
		if here.pod != "" && found.pod != "" && here.pod != found.pod {
			return place{}, fmt.Errorf("its cgroups name two pods, %s and %s", found.pod, here.pod)
		}
		if here.container != "" && found.container != "" && here.container != found.container {
			return place{}, fmt.Errorf("its cgroups name two containers, %s and %s", found.container, here.container)
		}
		if here.pod != "" {
			found.pod = here.pod
		}
		if here.container != "" {
			found.container = here.container
		}
	}
	if found.container == "" {
		return place{}, nil // what the runtime keeps beside the containers is none of them
	}
	return found, nil
}

// cutLine returns the hierarchy ("4:memory", "0:" for cgroup v2) and the path
// of a line, cgroups(7). No name of a cgroup holds a line break, but any may
// hold a colon.
func cutLine(line string) (hierarchy, path string, err error) {
	line = strings.TrimSuffix(line, "\n")
	id := strings.IndexByte(line, ':')
	if id < 0 {
		return "", "", errors.New("parse cgroup: a line without fields")
	}
	controllers := strings.IndexByte(line[id+1:], ':')
	if controllers < 0 {
		return "", "", errors.New("parse cgroup: a line with one field")
	}
	end := id + 1 + controllers
	if path = line[end+1:]; !strings.HasPrefix(path, "/") {
		return "", "", errors.New("parse cgroup: a path that does not begin with a slash")
	}
	return line[:end], path, nil
}

// pathIn returns the path of a hierarchy in a /proc/PID/cgroup.
func pathIn(cgroup, hierarchy string) string {
	for line := range strings.Lines(cgroup) {
		if h, path, err := cutLine(line); err == nil && h == hierarchy {
			return path
		}
	}
	return "/"
}

// locate returns the place that a path names. Only what the kubelet and the
// container runtime have made counts: from the node's own root down to the
// container's cgroup. Whatever is above may be a user's, with a user manager
// to which systemd delegates; whatever is below may be the container's own.
// Either can make cgroups that are named like somebody else's container.
func locate(path, own string) place {
	rest := strings.TrimPrefix(path, "/")
	if after, ok := cutUp(rest); ok {
		// In a cgroup namespace of its own, the agent sees the others' paths
		// from its own container: up, to the first cgroup they share, and
		// down. That one is the kubelet's, so the next must be too.
		return descend(after, true)
	}
	if root, ok := nodeRoot(own); ok {
		after, below := strings.CutPrefix(path, root+"/")
		if !below {
			return place{}
		}
		return descend(after, false)
	}
	return descend(skipParents(skipShared(rest, strings.TrimPrefix(own, "/"))), false)
}

// cutUp cuts off the steps upwards with which a path begins.
func cutUp(path string) (rest string, up bool) {
	for {
		name, after := cutName(path)
		if name != ".." {
			return path, up
		}
		path, up = after, true
	}
}

// nodeRoot returns the path above the cgroup of all pods, as the agent's own
// path has it where it runs in a pod. The last one counts: a node may itself
// be a container of a pod.
func nodeRoot(own string) (root string, ok bool) {
	for at := 0; at < len(own) && own[at] == '/'; {
		name, after := cutName(own[at+1:])
		if _, single := joinedNames(name); (single || isPodsRoot(name)) && descend(own[at+1:], false).container != "" {
			root, ok = own[:at], true
		}
		at = len(own) - len(after) - 1
		if after == "" {
			break
		}
	}
	return root, ok
}

// skipShared drops the names with which both paths begin: where the agent
// runs beside the kubelet, they are the node's. Below user.slice they are a
// user's, to whom systemd delegates: no pod is found there, also where the agent
// is in the same session (the pods of a rootless kubelet are found by an agent
// that is one of them).
func skipShared(path, own string) string {
	for {
		name, rest := cutName(path)
		mine, ownRest := cutName(own)
		if name == "" || name != mine || name == "user.slice" {
			return path
		}
		path, own = rest, ownRest
	}
}

// skipParents drops the cgroups under which kubelets and runtimes put the
// pods where that is not the root. Only root makes cgroups of these names
// there.
func skipParents(path string) string {
	for _, parent := range []string{"system.slice", "containerd.service", "kubelet", "kubelet.slice"} {
		if name, rest := cutName(path); name == parent {
			path = rest
		}
	}
	return path
}

// descend reads the names from the cgroup of all pods down to the container.
// Shared says that the first name may be any of them, since those before it
// are the agent's own as well.
func descend(path string, shared bool) place {
	name, rest := cutName(path)
	if p, ok := joinedNames(name); ok {
		return p
	}
	if id := containerOf(name); id != "" && (shared || strings.HasPrefix(name, "crio-")) {
		return place{container: id}
	}
	if isPodsRoot(name) {
		name, rest = cutName(rest)
	} else if !shared {
		return place{}
	}
	if isClass(name) {
		name, rest = cutName(rest)
	}
	uid := podOf(name)
	if uid == "" {
		return place{}
	}
	name, _ = cutName(rest)
	return place{pod: uid, container: containerOf(name)}
}

func cutName(path string) (name, rest string) {
	name, rest, _ = strings.Cut(path, "/")
	return name, rest
}

// joinedNames reads the one name that containerd makes of a path for systemd
// where it was told to manage cgroups itself:
// kubepods-burstable-pod….slice:cri-containerd:….
func joinedNames(name string) (place, bool) {
	slice, rest, ok := strings.Cut(name, ":")
	if !ok {
		return place{}, false
	}
	_, id, _ := strings.Cut(rest, ":")
	p := place{pod: podOf(slice), container: containerOf(id)}
	return p, p.pod != "" && p.container != ""
}

// isPodsRoot tells the cgroup of all pods: kubepods, or kubepods.slice where
// systemd makes it, with its parents' names before it.
func isPodsRoot(name string) bool {
	if name == "kubepods" {
		return true
	}
	slice, ok := strings.CutSuffix(name, ".slice")
	return ok && isPodsSlice(slice)
}

func isPodsSlice(slice string) bool {
	return slice == "kubepods" || strings.HasSuffix(slice, "-kubepods")
}

// isClass tells the cgroup of a quality of service class.
func isClass(name string) bool {
	if name == "besteffort" || name == "burstable" {
		return true
	}
	slice, ok := strings.CutSuffix(name, ".slice")
	if !ok {
		return false
	}
	root, ok := cutClass(slice)
	return ok && isPodsSlice(root)
}

func cutClass(slice string) (root string, ok bool) {
	if root, ok = strings.CutSuffix(slice, "-besteffort"); ok {
		return root, true
	}
	return strings.CutSuffix(slice, "-burstable")
}

// podOf returns the UID of a pod's cgroup: pod<UID>, or, where systemd makes
// it, kubepods-<class>-pod<UID>.slice with underscores for the dashes, which
// mean levels there. Empty: it is none.
func podOf(name string) string {
	uid, ok := strings.CutPrefix(name, "pod")
	if !ok {
		slice, ok := strings.CutSuffix(name, ".slice")
		if !ok {
			return ""
		}
		at := strings.LastIndex(slice, "-pod")
		if at < 0 {
			return ""
		}
		root, _ := cutClass(slice[:at])
		if !isPodsSlice(root) {
			return ""
		}
		uid = slice[at+len("-pod"):]
	}
	if uid == "" || len(uid) > maxUID || strings.HasSuffix(uid, ".slice") {
		return ""
	}
	for _, c := range []byte(uid) {
		if !isLetter(c) && !isDigit(c) && c != '-' && c != '_' {
			return ""
		}
	}
	return strings.ReplaceAll(uid, "_", "-")
}

// containerOf returns the ID of a container's cgroup: <ID>, or
// <runtime>-<ID>, each perhaps with .scope behind it. Empty: it is none.
// cri-o's crio-conmon-<ID> holds the process that watches the container, and
// is none.
func containerOf(name string) string {
	name = strings.TrimSuffix(name, ".scope")
	at := len(name) - containerIDLen
	if at < 0 || !isContainerID(name[at:]) {
		return ""
	}
	runtime := name[:at]
	if runtime == "" {
		return name
	}
	if !strings.HasSuffix(runtime, "-") || strings.Contains(runtime, "conmon") {
		return ""
	}
	for _, c := range []byte(runtime) {
		if c != '-' && (c < 'a' || c > 'z') {
			return ""
		}
	}
	return name[at:]
}

// isContainerID tells whether s is 64 hexadecimal digits, in lower case as
// all runtimes write them.
func isContainerID(s string) bool {
	if len(s) != containerIDLen {
		return false
	}
	for _, c := range []byte(s) {
		if !isDigit(c) && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isLetter(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }
