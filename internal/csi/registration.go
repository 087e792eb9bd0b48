package csi

import (
	"context"
	"errors"
	"fmt"

	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// specVersions are the versions of CSI that kubelet may choose from: the
// major one counts.
var specVersions = []string{"1.0.0"}

// GetInfo tells kubelet what stands behind the registration socket.
func (d *Driver) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type:              registration.CSIPlugin,
		Name:              d.cfg.DriverName,
		Endpoint:          d.endpoint(),
		SupportedVersions: specVersions,
	}, nil
}

// NotifyRegistrationStatus hears whether kubelet took the driver. Where it did
// not, kubelet tries again by itself.
func (d *Driver) NotifyRegistrationStatus(_ context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	switch {
	case s.GetPluginRegistered():
		d.setState(nil)
		d.log.Info("registered with kubelet", "driver", d.cfg.DriverName, "socket", d.endpoint())
	default:
		why := printable(s.GetError())
		if why == "" {
			why = "it gives no reason"
		}
		d.setState(fmt.Errorf("kubelet refused the driver: %w", errors.New(why)))
		d.log.Error("kubelet refused the driver", "driver", d.cfg.DriverName, "error", why)
	}
	return &registration.RegistrationStatusResponse{}, nil
}
