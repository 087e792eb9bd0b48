// Command manifests reads Kubernetes objects from standard input and refuses
// keys that their kinds do not have, keys that are there twice and values of
// a wrong type, as an API server with strict validation does. It knows what
// can be known without one: no values that depend on each other, no kinds
// that a cluster was taught (those are named on the command line, and only
// read as YAML).
//
//	manifests [-other Kind,…] < objects.yaml
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
)

func main() {
	other := flag.String("other", "", "kinds that are not Kubernetes' own, by comma")
	flag.Parse()
	if err := check(os.Stdin, strings.Split(*other, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "manifests:", err)
		os.Exit(1)
	}
}

// check reads all objects and returns what is wrong with any of them.
func check(from io.Reader, other []string) error {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		appsv1.AddToScheme, batchv1.AddToScheme, corev1.AddToScheme, networkingv1.AddToScheme, rbacv1.AddToScheme, storagev1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			return err
		}
	}
	strict := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme, scheme, json.SerializerOptions{Yaml: true, Strict: true})
	var problems []error
	docs := utilyaml.NewYAMLReader(bufio.NewReader(from))
	for n := 1; ; n++ {
		doc, err := docs.Read()
		if errors.Is(err, io.EOF) {
			return errors.Join(problems...)
		}
		if err != nil {
			return fmt.Errorf("object %d: %w", n, err)
		}
		_, kind, err := strict.Decode(doc, nil, nil)
		if err != nil && !(kind != nil && runtime.IsNotRegisteredError(err) && slices.Contains(other, kind.Kind)) {
			problems = append(problems, fmt.Errorf("object %d: %w", n, err))
		}
	}
}
