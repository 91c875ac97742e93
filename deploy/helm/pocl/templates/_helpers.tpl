{{/* The name of the release's objects. */}}
{{- define "pocl.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end }}

{{/* The labels by which pods are selected. Takes a list of the context and the component. */}}
{{- define "pocl.selector" -}}
{{- $context := index . 0 -}}
app.kubernetes.io/name: {{ $context.Chart.Name }}
app.kubernetes.io/instance: {{ $context.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* All labels. Takes the same list. */}}
{{- define "pocl.labels" -}}
{{- $context := index . 0 -}}
{{ include "pocl.selector" . }}
app.kubernetes.io/version: {{ $context.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $context.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $context.Chart.Name $context.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An image. Takes a list of the context and the image. */}}
{{- define "pocl.image" -}}
{{- $context := index . 0 -}}
{{- $image := index . 1 -}}
{{- if $image.digest -}}
{{- printf "%s@%s" $image.repository $image.digest | quote -}}
{{- else -}}
{{- printf "%s:%s" $image.repository (default $context.Chart.AppVersion $image.tag) | quote -}}
{{- end -}}
{{- end }}

{{- define "pocl.serviceAccount" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "pocl.name" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{/* What every pod has, beside its containers and volumes. */}}
{{- define "pocl.pod" -}}
serviceAccountName: {{ include "pocl.serviceAccount" . }}
automountServiceAccountToken: false
# Variables that describe the services of the namespace have the names of settings.
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.images.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "pocl.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* A value as a text. Helm reads whole numbers as floats, which would be written with an exponent. */}}
{{- define "pocl.text" -}}
{{- if and (kindIs "float64" .) (eq . (floor .)) -}}{{ printf "%.0f" . }}{{- else -}}{{ toString . }}{{- end -}}
{{- end }}

{{/* The variables of every process. */}}
{{- define "pocl.environment" -}}
# Volumes belong to root and let the group of the pod write, so what is to be this user's alone lies below them.
- {name: POCL_HOME, value: /var/lib/pocl/home}
- {name: POCL_MODEL_ROOTS, value: /var/lib/pocl/models}
- {name: POCL_DATABASE_URL_FILE, value: /run/secrets/pocl/database-url}
{{- if eq .Values.artifacts.kind "persistentVolumeClaim" }}
- {name: POCL_ARTIFACT_ROOT, value: /var/lib/pocl/artifacts}
{{- else }}
- {name: POCL_ARTIFACT_STORE, value: {{ required "artifacts.objectStore.url names the store" .Values.artifacts.objectStore.url | quote }}}
{{- end }}
{{- range $name, $value := .Values.settings }}
- {name: {{ $name }}, value: {{ include "pocl.text" $value | quote }}}
{{- end }}
{{- end }}

{{/* Variables out of Secrets: that of the object store, and others. Takes a list of the context and the names of these. */}}
{{- define "pocl.environmentFrom" -}}
{{- $context := index . 0 -}}
{{- $names := index . 1 -}}
{{- if eq $context.Values.artifacts.kind "objectStore" }}
{{- $names = prepend $names $context.Values.artifacts.objectStore.existingSecret }}
{{- end }}
{{- with compact $names }}
envFrom:
  {{- range . }}
  - secretRef: {name: {{ . }}}
  {{- end }}
{{- end }}
{{- end }}

{{/* A volume with these keys of the Secret alone. Takes a list of the context and the keys. */}}
{{- define "pocl.secretVolume" -}}
{{- $context := index . 0 -}}
- name: secrets
  secret:
    secretName: {{ required "secrets.existingSecret names a Secret" $context.Values.secrets.existingSecret }}
    # Read by the group of the pod, and by no other.
    defaultMode: 0440
    items:
      {{- range index . 1 }}
      - {key: {{ . }}, path: {{ . }}}
      {{- end }}
{{- end }}

{{- define "pocl.artifactVolume" -}}
{{- if eq .Values.artifacts.kind "persistentVolumeClaim" }}
- name: artifacts
  persistentVolumeClaim: {claimName: {{ default (printf "%s-artifacts" (include "pocl.name" .)) .Values.artifacts.existingClaim }}}
{{- end }}
{{- end }}

{{- define "pocl.artifactMount" -}}
{{- if eq .Values.artifacts.kind "persistentVolumeClaim" }}
- {name: artifacts, mountPath: /var/lib/pocl/artifacts}
{{- end }}
{{- end }}

{{- define "pocl.modelVolume" -}}
{{- with .Values.models.existingClaim }}
- name: models
  persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "pocl.modelMount" -}}
{{- if .Values.models.existingClaim }}
- {name: models, mountPath: /var/lib/pocl/models, readOnly: true}
{{- end }}
{{- end }}

{{/* Where the pods of a component run. Takes a list of the context, the component and its values. */}}
{{- define "pocl.placement" -}}
{{- $context := index . 0 -}}
{{- $values := index . 2 -}}
{{- with $values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "pocl.selector" (list $context (index . 1)) | nindent 8 }}
{{- end }}

{{/* The probe of a process that writes a liveness file. */}}
{{- define "pocl.livenessFile" -}}
exec: {command: [python, -m, worker.liveness, /tmp/liveness]}
periodSeconds: 15
timeoutSeconds: 5
{{- end }}
